"""Routing Transformer: online k-means against loops, the mixer against its formula, centroids that follow the data."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from repository import with_helpers
from torch.nn import functional as F
from zoo import SETTINGS, ConfigRefused, build, config, inputs, probed

from efficient_transformers import VARIANTS
from efficient_transformers.models import ops_kmeans
from efficient_transformers.models.base_mixer import SequenceInfo
from efficient_transformers.models.modeling_routing import EtRoutingAttention
from efficient_transformers.models.ops_kmeans import (
    ClusterStatistics,
    cluster_statistics,
    merge_statistics,
    moved_centroids,
    nearest_centroid,
    nearest_tokens,
    random_directions,
)

ROUTING = VARIANTS["routing"]
HEADS, CLUSTERS, DIM = 3, 5, 7


def directions(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def padding(batch: int, length: int) -> torch.Tensor:
    """Fewer real tokens in each row than in the one before; at last none."""
    lengths = torch.tensor([length, length // 2 + 1, 1, 0])[:batch]
    return torch.arange(length) < lengths[:, None]


def centroids_of(model) -> list[torch.Tensor]:
    """All buffers that move in training."""
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith(("centroids", "sums", "savings"))]


def all_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    assert len(left) == len(right) > 0
    return all(a.equal(b) for a, b in zip(left, right, strict=True))


# k-means ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 200, None], ids=["head by head", "some heads", "at once"])
def any_way(request, monkeypatch):
    """Head by head or some together, as on a CPU, and at once as elsewhere."""
    monkeypatch.setattr(ops_kmeans, "AT_ONCE", request.param)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param is None)


@pytest.mark.parametrize(("length", "size"), [(23, 4), (3, 3), (1, 1), (4, 9)])
def test_a_centroid_takes_the_nearest_tokens(length, size, any_way):
    x, centroids, keep = directions(4, HEADS, length, DIM), directions(HEADS, CLUSTERS, DIM), padding(4, length)
    sizes = torch.tensor([size, 2, 1, 1])
    taken = nearest_tokens(x, centroids, size, sizes, keep)
    for b, h, c in torch.cartesian_prod(*(torch.arange(n) for n in taken.shape[:3])).tolist():
        cosines = [float(x[b, h, token] @ centroids[h, c]) for token in range(length) if keep[b, token]]
        nearest = sorted(range(len(cosines)), key=lambda token: -cosines[token])[: sizes[b]]
        assert taken[b, h, c].tolist() == nearest + [-1] * (size - len(nearest))
    everywhere = nearest_tokens(x, centroids, min(size, length), None, None)
    assert (everywhere >= 0).all()


def test_of_equally_near_tokens_the_first_are_taken():
    """Whatever rounding says: copies of a token come out of a matrix product with different last bits."""
    token, centroids = directions(1, 1, 1, DIM), directions(1, 2, DIM)
    x = (token.expand(-1, -1, 40, -1) + 1e-12 * torch.randn(1, 1, 40, DIM, dtype=torch.float64)).clone()
    x[0, 0, 11] = centroids[0, 0]
    taken = nearest_tokens(x, centroids, 4, None, None)
    assert taken[0, 0, 0].tolist() == [11, 0, 1, 2]
    assert set(taken[0, 0, 1].tolist()) - {11} <= {0, 1, 2, 3}


@pytest.mark.parametrize("count", [1, CLUSTERS])
def test_statistics_are_those_of_a_loop(count, any_way):
    x, centroids, keep = directions(4, HEADS, 13, DIM), directions(HEADS, count, DIM), padding(4, 13)
    found = cluster_statistics(x, centroids, keep)
    assert nearest_centroid(x, centroids).equal((x @ centroids.transpose(1, 2)).argmax(-1))
    for h in range(HEADS):
        members = [[] for _ in range(count)]
        for token in x[:, h][keep]:
            ranking = sorted(((float(token @ mu), c) for c, mu in enumerate(centroids[h])), reverse=True)
            second = ranking[1][0] if count > 1 else -1.0
            members[ranking[0][1]].append((ranking[0][0], ranking[0][0] - second, token))
        for c, inside in enumerate(members):
            expected = torch.stack([token for _, _, token in inside]).sum(0) if inside else torch.zeros(DIM)
            torch.testing.assert_close(found.sums[h, c], expected.double())
            assert found.distortion[h, c].item() == pytest.approx(sum(1 - best for best, _, _ in inside))
            assert found.savings[h, c].item() == pytest.approx(sum(saving for _, saving, _ in inside))
            if not inside:
                assert found.lowest[h, c] == 2
                continue
            best, _, token = min(inside, key=lambda member: member[0])
            assert found.lowest[h, c].item() == pytest.approx(best)
            torch.testing.assert_close(found.farthest[h, c], token)


def test_statistics_of_parts_are_those_of_the_whole():
    x, centroids = directions(6, HEADS, 9, DIM), directions(HEADS, CLUSTERS, DIM)
    parts = [cluster_statistics(part, centroids, None) for part in x.split([1, 3, 2])]
    parts = [ClusterStatistics.unpacked(part.packed()) for part in parts]
    for a, b in zip(merge_statistics(parts), cluster_statistics(x, centroids, None), strict=True):
        torch.testing.assert_close(a, b)


def test_the_first_pass_puts_centroids_in_the_middle_of_their_members_and_later_ones_smooth():
    centroids, x = directions(1, 2, DIM), [directions(1, 1, 50, DIM) for _ in range(2)]
    seen = [cluster_statistics(part, centroids, None) for part in x]
    none = torch.zeros_like(centroids), torch.zeros(1, 2, dtype=torch.float64)
    first, sums, savings = moved_centroids(centroids, *none, seen[0], 0.9)
    torch.testing.assert_close(first, F.normalize(seen[0].sums, dim=-1))
    second, sums, _ = moved_centroids(first, sums, savings, seen[1], 0.9)
    torch.testing.assert_close(second, F.normalize(0.9 * seen[0].sums + seen[1].sums, dim=-1))
    torch.testing.assert_close(sums, 0.1 * (0.9 * seen[0].sums + seen[1].sums))


def test_a_centroid_that_saves_nothing_starts_again_in_the_cluster_that_needs_it():
    """One without members, and one of two that share what one of them could hold."""
    axes = torch.eye(6, dtype=torch.float64)
    crowd = torch.cat([F.normalize(axes[:1] + 0.01 * torch.randn(30, 6), dim=-1), axes[1:2], axes[2:3].expand(9, -1)])
    crowd[-1] = F.normalize(axes[2] + axes[5], dim=0)
    mixture = F.normalize(axes[1] + axes[2], dim=0)  # holds axis 1 and axis 2, badly
    for useless in (-axes[0], F.normalize(axes[0] + 1e-3 * axes[4], dim=0)):
        centroids = torch.stack([axes[0], mixture, useless])[None]
        seen = cluster_statistics(crowd[None, None], centroids, None)
        none = torch.zeros_like(centroids), torch.zeros(1, 3, dtype=torch.float64)
        moved, sums, savings = moved_centroids(centroids, *none, seen, 0.9)
        assert seen.distortion.argmax() == 1
        started = [c for c in range(3) if moved[0, c].equal(seen.farthest[0, 1])]
        assert len(started) == 1
        assert started != [1]
        torch.testing.assert_close(sums[0, started[0]], 0.1 * seen.farthest[0, 1])
        assert savings[0, started[0]] > 0


def test_the_start_is_on_the_sphere_and_comes_from_the_seed():
    draws = [random_directions(2, 9, DIM, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    torch.testing.assert_close(draws[0].norm(dim=-1), torch.ones(2, 9))
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    layers = [mixer.mixer.centroids for mixer in build(ROUTING, SETTINGS["routing"][0]).layers]
    assert not layers[0].equal(layers[1])


# the mixer ----------------------------------------------------------------------------------------------------------


def written_out(mixer: EtRoutingAttention, hidden: torch.Tensor) -> torch.Tensor:
    """One row without padding, token by token and head by head: (n, e) -> (n, e)."""
    cfg, length, dim = mixer.config, len(hidden), mixer.head_dim
    q, v = (proj(hidden).view(length, -1, dim) for proj in (mixer.q_proj, mixer.v_proj))
    k = q if mixer.k_proj is None else mixer.k_proj(hidden).view(length, -1, dim)
    mixed = torch.zeros(length, cfg.num_attention_heads, dim, dtype=hidden.dtype)
    for head in range(cfg.num_attention_heads):
        reads = [[] for _ in range(length)]
        queries = q[:, head]
        if head < cfg.num_local_heads:
            keys = k[:, head]
            for i in range(length):
                reads[i] = [
                    j for j in range(length) if abs(i - j) <= cfg.window_size and not (cfg.is_decoder and j > i)
                ]
        else:
            queries = F.normalize(queries, dim=-1) * dim**0.5
            keys = queries if cfg.is_decoder else F.normalize(k[:, head], dim=-1) * dim**0.5
            centroids = mixer.centroids[head - cfg.num_local_heads]
            if cfg.is_decoder:
                cluster = [int((centroids @ query).argmax()) for query in queries]
                for i in range(length):
                    reads[i] = [j for j in range(i) if cluster[j] == cluster[i]][-cfg.reach :] or [i]
            else:
                size = cfg.cluster_size or -(-length // cfg.clusters_per_head)
                for centroid in centroids:
                    members = [(x @ centroid).argsort(descending=True)[:size].tolist() for x in (queries, keys)]
                    for i in members[0]:
                        reads[i] += members[1]
                reads = [some or [i] for i, some in enumerate(reads)]
        for i in range(length):
            weights = torch.stack([queries[i] @ keys[j] for j in reads[i]]).div(dim**0.5).softmax(0)
            mixed[i, head] = sum(w * v[j, head] for w, j in zip(weights, reads[i], strict=True))
    return mixer.o_proj(mixed.flatten(1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"num_clusters": 4},
        {"num_clusters": 3, "local_heads": 1, "cluster_size": 5},
        {"num_clusters": 30, "local_heads": 0},
        {"num_clusters": 1, "local_heads": 3, "cluster_size": 100},
        {"num_clusters": 2, "local_heads": 4},
    ],
)
def test_the_layer_is_what_the_formula_says(fields, causal):
    cfg = config(ROUTING, {"window_size": 2, **fields}, is_decoder=causal, num_attention_heads=4, hidden_size=20)
    cfg._attn_implementation = "sdpa"
    mixer = EtRoutingAttention(cfg, 0).double().eval()
    lengths = (19, 11, 1)
    hidden, positions = torch.randn(3, 19, 20, dtype=torch.float64), torch.arange(19).expand(3, -1)
    keep = positions < torch.tensor(lengths)[:, None]
    info = SequenceInfo(torch.where(keep, positions, -1), padding_mask=keep, lengths=lengths)
    output, weights = mixer(hidden, info)
    assert weights is None
    cfg._attn_implementation = "eager"
    dense, weights = mixer(hidden, SequenceInfo(torch.where(keep, positions, -1), padding_mask=keep, lengths=lengths))
    torch.testing.assert_close(weights.sum(-1), keep[:, None].expand(-1, 4, -1).double())
    for row, length in enumerate(lengths):
        expected = written_out(mixer, hidden[row, :length])
        torch.testing.assert_close(output[row, :length], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dense[row, :length], expected, rtol=1e-9, atol=1e-9)


def test_later_tokens_change_nothing_before_them():
    """Not even those that every centroid likes best: who reads whom is settled when a token comes."""
    settings = {"num_clusters": 3, "local_heads": 0, "cluster_size": 4}
    model = build(ROUTING, settings, is_decoder=True, use_cache=False, num_hidden_layers=1)
    embeds = torch.randn(1, 60, 32, dtype=torch.float64)
    expected = model(inputs_embeds=embeds).last_hidden_state[:, :30]
    embeds[:, 30:] = embeds[:, :30].flip(1)  # the very same content, so the same clusters
    torch.testing.assert_close(model(inputs_embeds=embeds).last_hidden_state[:, :30], expected, rtol=1e-12, atol=1e-12)
    both_ways = build(ROUTING, settings, num_hidden_layers=1)
    changed = both_ways(inputs_embeds=embeds).last_hidden_state[:, :30]
    alone = both_ways(inputs_embeds=embeds[:, :30]).last_hidden_state
    assert (changed - alone).abs().max() > 1e-3


# centroids ----------------------------------------------------------------------------------------------------------


def planted(count: int, dim: int, heads: int, seed: int):
    """Draws (hidden (b, n, h·d), labels (b, h, n)): in each head noisy copies of `count` orthogonal directions."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(heads, dim, count, generator=generator, dtype=torch.float64))[0].transpose(1, 2)

    def draw(batch: int, length: int):
        labels = torch.stack(
            [
                torch.stack([torch.randperm(length, generator=generator) % count for _ in range(heads)])
                for _ in range(batch)
            ]
        )
        x = torch.stack([axes[h][labels[:, h]] for h in range(heads)], 2)  # (b, n, h, d)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) / dim**0.5
        return (x + 0.3 * noise).flatten(2), labels

    return draw


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_planted_clusters_are_found(seed, causal):
    """From random centroids, through the layer; then a token reads those of its own cluster, and all of them."""
    fields = {"num_clusters": 8, "local_heads": 0, "cluster_seed": seed, "position_embedding_type": "none"}
    cfg = config(ROUTING, fields, hidden_size=32, num_attention_heads=2, is_decoder=causal)
    mixer = EtRoutingAttention(cfg, 0).double().train()
    for proj in filter(None, (mixer.q_proj, mixer.k_proj)):
        torch.nn.init.eye_(proj.weight)
        torch.nn.init.zeros_(proj.bias)
    draw = planted(8, 16, 2, seed)
    for _ in range(25):
        hidden, _ = draw(2, 160)
        info = SequenceInfo(torch.arange(160).expand(2, -1))
        mixer(hidden, info)
        mixer.finish_pass(info)
    hidden, labels = draw(2, 160)
    torch.testing.assert_close(mixer.centroids.norm(dim=-1), torch.ones(2, 8, dtype=torch.float64))
    clusters = nearest_centroid(hidden.view(2, 160, 2, 16).transpose(1, 2), mixer.centroids)
    for head in range(2):
        pairs = set(zip(labels[:, head].flatten().tolist(), clusters[:, head].flatten().tolist(), strict=True))
        assert len(pairs) == len({label for label, _ in pairs}) == len({cluster for _, cluster in pairs}) == 8
    info = SequenceInfo(torch.arange(160).expand(2, -1), output_attentions=True)
    read = mixer.eval()(hidden, info)[1] > 0
    same = labels[..., None] == labels[..., None, :]
    if not causal:
        assert read.equal(same)
    assert not (read & ~same).any()


@pytest.mark.parametrize("head", ["MaskedLM", "CausalLM"])
def test_only_training_moves_the_centroids(head):
    model, ids = build(ROUTING, SETTINGS["routing"][0], head), inputs(2, 50)
    start = centroids_of(model)
    model(ids, labels=ids).loss.backward()
    assert all_equal(centroids_of(model), start)
    model.train()(ids, labels=ids)
    moved = centroids_of(model)
    assert not any(a.equal(b) for a, b in zip(moved, start, strict=True))
    model.eval()
    model.generate(ids, max_new_tokens=3) if head == "CausalLM" else model(ids)
    assert all_equal(centroids_of(model), moved)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "reversible"])
def test_a_pass_moves_them_once_however_often_its_layers_run(how):
    ids, states = inputs(2, 50), []
    start = build(ROUTING, SETTINGS["routing"][0], reversible=how == "reversible").train()
    for again in (False, True):
        model = deepcopy(start)
        if again and how != "reversible":
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        # a reversible stack that gives out its hidden states keeps them
        hidden = model(ids, output_hidden_states=how == "reversible" and not again).last_hidden_state
        before = centroids_of(model)
        probed(hidden).backward()
        assert all_equal(centroids_of(model), before)
        states.append(before)
    assert all_equal(*states)


def test_padding_moves_no_centroid():
    model = build(ROUTING, SETTINGS["routing"][0]).train()
    other, ids = deepcopy(model), inputs(1, 40)
    padded = torch.cat([inputs(1, 25), ids], 1)
    model(ids)
    other(padded, attention_mask=(torch.arange(65) >= 25).long()[None])
    for a, b in zip(centroids_of(model), centroids_of(other), strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_that_is_continued_moves_them_as_one_never_stopped(tmp_path):
    torch.manual_seed(0)
    model = build(ROUTING, SETTINGS["routing"][0], "CausalLM", dtype=torch.float32).train()
    batches = inputs(6, 40).split(2)
    model(batches[0])
    model.save_pretrained(tmp_path)
    continued = ROUTING.model_class("CausalLM").from_pretrained(tmp_path).train()
    for ids in batches[1:]:
        assert model(ids).logits.equal(continued(ids).logits)
        assert all_equal(centroids_of(model), centroids_of(continued))


def test_they_move_in_float32_under_narrow_weights():
    """0.999 of a bfloat16 is that bfloat16 again."""
    model = build(ROUTING, SETTINGS["routing"][0], dtype=torch.bfloat16).train()
    model(inputs(2, 50))
    assert {buffer.dtype for buffer in centroids_of(model)} == {torch.float32}
    assert model(inputs(2, 50)).last_hidden_state.dtype == torch.bfloat16


def test_a_compiled_training_pass_moves_them_alike():
    torch.compiler.reset()
    model = build(ROUTING, SETTINGS["routing"][0], dtype=torch.float32).train()
    other, ids = deepcopy(model), inputs(2, 50)
    expected = model(ids).last_hidden_state
    actual = torch.compile(other, backend="aot_eager", fullgraph=True)(ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(centroids_of(model), centroids_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


PROCESS = """
import sys, torch
from test_routing import trained_on
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.save(trained_on(slice(2 * rank, 2 * rank + 2), distributed=True), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def trained_on(rows: slice, distributed: bool) -> list[torch.Tensor]:
    """Buffers behind three steps on these rows of every batch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build(ROUTING, SETTINGS["routing"][0], "SequenceClassification").train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if distributed else model
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in inputs(12, 40).split(4):
        wrapped(batch[rows], labels=torch.tensor([0, 1, 1, 0])[rows]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return centroids_of(model)


def test_all_processes_hold_the_centroids_of_the_whole_batch(tmp_path):
    command, environment = [sys.executable, "-c", PROCESS], with_helpers(Path(__file__).parent)
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all_equal(first, second)
    for a, b in zip(first, trained_on(slice(None), distributed=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# config -------------------------------------------------------------------------------------------------------------


def test_defaults_follow_the_length():
    for positions, clusters, reach in ((4096, 64, 64), (128, 16, 8), (1, 1, 1), (5000, 64, 79)):
        cfg = ROUTING.config_class(max_position_embeddings=positions)
        assert (cfg.clusters_per_head, cfg.reach, cfg.num_local_heads) == (clusters, reach, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_clusters": 0}, r"num_clusters \(0\) must be at least 1: None takes"),
        ({"cluster_size": 0}, r"cluster_size \(0\) must be at least 1"),
        ({"window_size": 0}, r"window_size \(0\) must be at least 1"),
        ({"local_heads": 5}, r"local_heads \(5\) must lie between 0 and num_attention_heads \(4\)"),
        ({"local_heads": -1}, r"local_heads \(-1\) must lie between 0"),
        ({"ema_decay": 1.0}, r"ema_decay \(1.0\) must lie in \[0, 1\)"),
        ({"num_cluster": 3}, "did you mean 'num_clusters'"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ConfigRefused, match=message):
        config(ROUTING, fields)

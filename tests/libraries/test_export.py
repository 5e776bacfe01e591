"""A saved checkpoint carries its code: it opens in a fresh process in which this package cannot be imported."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from zoo import SETTINGS, build, for_head, inputs_of

from efficient_transformers import VARIANTS

OPEN = """
import sys
sys.modules["efficient_transformers"] = None  # an editable install must not hide a leak
import json, pathlib, torch, transformers

torch.set_num_threads(1)  # as in the process that saved: two threads add up in another order
root = pathlib.Path(sys.argv[1])
for case in json.loads((root / "cases.json").read_text()):
    folder, auto_class = root / case["folder"], getattr(transformers, case["auto_class"])
    for opened in (folder, root / "again" / case["folder"]):
        model, report = auto_class.from_pretrained(opened, trust_remote_code=True, output_loading_info=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        for parameter in model.parameters():  # loaded ones lie where the file puts them, and a product of
            parameter.data = parameter.data.clone()  # unaligned vectors may differ in its last bit
        stored = torch.load(root / f"{case['folder']}.pt")
        with torch.no_grad():
            outputs = model.eval()(stored["ids"], attention_mask=stored["mask"])
        for name, value in stored["outputs"].items():
            assert torch.equal(outputs[name], value), (case, name)
        if opened == folder:
            model.save_pretrained(root / "again" / case["folder"])
    other = transformers.AutoModel.from_pretrained(opened, trust_remote_code=True)  # any head's checkpoint has a body
    assert type(other).__name__.endswith("Model")
print("opened", len(json.loads((root / "cases.json").read_text())))
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("slug", VARIANTS)
def test_a_checkpoint_opens_without_the_package(slug, tmp_path):
    variant, cases = VARIANTS[slug], []
    for head in (None, *variant.heads):
        model = build(variant, SETTINGS[slug][0], head, dtype=torch.float32)
        ids = inputs_of(model, 2, 70)
        shape = (2, model.config.max_position_embeddings) if ids.is_floating_point() else ids.shape
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, ..., :11] = 0
        with torch.no_grad():
            outputs = {k: v for k, v in model(ids, attention_mask=mask).items() if isinstance(v, torch.Tensor)}
        folder = f"{slug}-{head or 'body'}"
        model.save_pretrained(tmp_path / folder)
        torch.save({"ids": ids, "mask": mask, "outputs": outputs}, tmp_path / f"{folder}.pt")
        cases.append({"folder": folder, "auto_class": f"AutoModelFor{head}" if head else "AutoModel"})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", OPEN, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert f"opened {len(cases)}" in done.stdout, done.stderr[-3000:]


def test_a_config_opens_as_every_head():
    for variant in VARIANTS.values():
        auto_map = variant.config_class().auto_map
        assert auto_map.keys() == {"AutoConfig", "AutoModel", *(f"AutoModelFor{head}" for head in variant.heads)}


def test_importing_again_is_harmless():
    code = (
        "import transformers; transformers.AutoConfig; import efficient_transformers as e, importlib;"
        "importlib.reload(e); print(transformers.AutoConfig.for_model('et_local').window_size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "128", done.stderr[-2000:]


def test_auto_classes_know_every_variant():
    for variant in VARIANTS.values():
        sizes = {"hidden_size": 8, "num_hidden_layers": 0, "vocab_size": 5}
        for head in variant.heads:
            cfg = transformers.AutoConfig.for_model(variant.model_type, **sizes, **for_head(head))
            model = getattr(transformers, f"AutoModelFor{head}").from_config(cfg)
            assert type(model) is variant.model_class(head)

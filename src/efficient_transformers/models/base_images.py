"""Images as sequences: a square of pixels is a token."""

from torch import Tensor, nn
from torch.nn import functional as F

from .ops_checks import check_at_least, check_divisible, check_entries, check_shape


def image_sides(image_size: int | list[int]) -> tuple[int, int]:
    """Height and width in pixels; one number means both."""
    if isinstance(image_size, int):
        return image_size, image_size
    check_entries("image_size", image_size, "its number of sides", 2, "give [height, width], or one number for both")
    return image_size[0], image_size[1]


def count_patches(image_size: int | list[int], patch_size: int) -> int:
    """Tokens of an image. Raises ValueError unless patches fill it without a rest."""
    check_at_least("patch_size", patch_size, 1, "1 makes a token of every pixel")
    sides = image_sides(image_size)
    for side in sides:
        check_at_least("image_size", side, 1, "an image has pixels")
        check_divisible("image_size", side, "patch_size", patch_size, "change either, or resize the images")
    return sides[0] * sides[1] // patch_size**2


class PatchEmbeddings(nn.Module):
    """One linear map of the pixels of each patch, row by row of the image (Dosovitskiy et al. 2021, eq. 1)."""

    def __init__(self, image_size: int | list[int], patch_size: int, num_channels: int, hidden_size: int):
        super().__init__()
        self.shape, self.patch_size = (num_channels, *image_sides(image_size)), patch_size
        self.projection = nn.Linear(num_channels * patch_size**2, hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, c, height, width) -> (b, n, e)."""
        axes = "batch, channels, height, width"
        check_shape("pixel_values", pixel_values.shape, (pixel_values.shape[0], *self.shape), axes)
        patches = F.pixel_unshuffle(pixel_values, self.patch_size)  # (b, c·p², height/p, width/p)
        patches, weight = patches.flatten(2).transpose(1, 2), self.projection.weight
        if isinstance(weight, Tensor) and weight.is_floating_point():  # a quantised layer converts its own input
            patches = patches.to(weight.dtype)
        return self.projection(patches)

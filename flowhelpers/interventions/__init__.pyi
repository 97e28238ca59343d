from .batched import intervene as intervene
from .edits import (
    add as add,
    add_per_row as add_per_row,
    rescale as rescale,
    rescale_per_row as rescale_per_row,
)
from .generation import generate as generate, prompt_ids as prompt_ids

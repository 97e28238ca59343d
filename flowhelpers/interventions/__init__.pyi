from .batched import intervene as intervene
from .edits import add as add
from .edits import add_per_row as add_per_row
from .edits import rescale as rescale
from .edits import rescale_per_row as rescale_per_row
from .generation import generate as generate
from .generation import prompt_ids as prompt_ids

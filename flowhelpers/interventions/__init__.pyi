from .batched import (
    PREDECESSOR_OFFSETS as PREDECESSOR_OFFSETS,
    TARGET_OFFSET as TARGET_OFFSET,
    Outcome as Outcome,
    intervene as intervene,
)
from .edits import (
    add as add,
    add_per_row as add_per_row,
    rescale as rescale,
    rescale_per_row as rescale_per_row,
)
from .generation import (
    NotFiniteError as NotFiniteError,
    continuations as continuations,
    generate as generate,
    prompt_ids as prompt_ids,
    sample_seed as sample_seed,
    sample_tokens as sample_tokens,
)

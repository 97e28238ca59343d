from .attention import attention_output as attention_output
from .load import Suite as Suite, load_suite as load_suite
from .model import (
    Model as Model,
    logits_of as logits_of,
    run_model as run_model,
    token_strings as token_strings,
    tokenize as tokenize,
)
from .registry import GEMMA as GEMMA, find_suite as find_suite, registered as registered
from .saes import SAE as SAE

from .attention import (
    attention_output as attention_output,
)
from .bridge import load_model as load_model
from .load import (
    Suite as Suite,
    check_sources as check_sources,
    chosen_device as chosen_device,
    chosen_dtype as chosen_dtype,
    load_suite as load_suite,
)
from .model import (
    HOOKS as HOOKS,
    Activations as Activations,
    Edit as Edit,
    Model as Model,
    PromptCache as PromptCache,
    Tokens as Tokens,
    cache_prompt as cache_prompt,
    editing as editing,
    final_norm as final_norm,
    forward as forward,
    is_edited as is_edited,
    logits_of as logits_of,
    run_model as run_model,
    token_losses as token_losses,
    token_strings as token_strings,
    tokenize as tokenize,
)
from .registry import (
    DATA as DATA,
    GEMMA as GEMMA,
    SuiteRow as SuiteRow,
    declared_l0 as declared_l0,
    declared_variance as declared_variance,
    find_suite as find_suite,
    registered as registered,
)
from .saes import (
    SAE as SAE,
    SMALLEST_THRESHOLD as SMALLEST_THRESHOLD,
)

from .corpora import (
    HELD_OUT_PERCENT as HELD_OUT_PERCENT,
    Documents as Documents,
    digests as digests,
    hub_documents as hub_documents,
    is_held_out as is_held_out,
    load_source as load_source,
    load_texts as load_texts,
    passages as passages,
    subjects as subjects,
)
from .preflight import (
    preflight_once as preflight_once,
    run_preflight as run_preflight,
)
from .sampling import (
    datasets_for as datasets_for,
    draw_sample as draw_sample,
    sample_sizes as sample_sizes,
    texts_of as texts_of,
)
from .sparse import (
    PASS_TENSORS as PASS_TENSORS,
    FeatureActivations as FeatureActivations,
    collect as collect,
    collect_tokens as collect_tokens,
    read_batches as read_batches,
    read_sample as read_sample,
)

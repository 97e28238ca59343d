from .corpora import (
    load_texts as load_texts,
    passages as passages,
    subjects as subjects,
)
from .preflight import run_preflight as run_preflight
from .sampling import (
    datasets_for as datasets_for,
    draw_sample as draw_sample,
    sample_sizes as sample_sizes,
    texts_of as texts_of,
)
from .sparse import (
    FeatureActivations as FeatureActivations,
    collect as collect,
    read_sample as read_sample,
)

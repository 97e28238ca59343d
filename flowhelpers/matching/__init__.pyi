from .cosine import (
    quick_dtype as quick_dtype,
    top_k_cosine as top_k_cosine,
    unit_rows as unit_rows,
)
from .matchers import (
    LEAST_ACTIVE as LEAST_ACTIVE,
    null_cosines as null_cosines,
    rotated as rotated,
)
from .table import (
    CLASSES as CLASSES,
    NULL_QUANTILE as NULL_QUANTILE,
    agreement as agreement,
    check_threshold as check_threshold,
    classify as classify,
    dominant_module as dominant_module,
    feature_scores as feature_scores,
    match_table as match_table,
    transition as transition,
)

from .cosine import top_k_cosine as top_k_cosine, unit_rows as unit_rows
from .null import NULL_QUANTILE as NULL_QUANTILE, null_cosines as null_cosines, rotated as rotated
from .plots import (
    against_chance as against_chance,
    agreement_map as agreement_map,
    classes_by_layer as classes_by_layer,
    scores_by_layer as scores_by_layer,
    share_above_null as share_above_null,
)
from .scores import (
    CLASSES as CLASSES,
    agreement as agreement,
    best_matches as best_matches,
    check_threshold as check_threshold,
    classify as classify,
    dominant_module as dominant_module,
    feature_scores as feature_scores,
    transition as transition,
)
from .table import match_table as match_table

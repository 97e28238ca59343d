from .coactivation import (
    coactivation_by_cosine as coactivation_by_cosine,
    coactivation_of_matches as coactivation_of_matches,
    disagreements as disagreements,
)
from .occurrences import (
    GROUPS as GROUPS,
    find_occurrences as find_occurrences,
    shuffled_tokens as shuffled_tokens,
    youden_thresholds as youden_thresholds,
)
from .plots import (
    class_bars as class_bars,
    group_bars as group_bars,
    group_scatter as group_scatter,
    groups_by_layer as groups_by_layer,
    pair_heatmaps as pair_heatmaps,
    score_densities as score_densities,
    together_by_cosine as together_by_cosine,
    transition_heatmap as transition_heatmap,
)
from .shares import (
    group_profiles as group_profiles,
    group_shares as group_shares,
    score_histograms as score_histograms,
    share_intervals as share_intervals,
    single_source_points as single_source_points,
    transition_intervals as transition_intervals,
)
from .significance import (
    check_alpha as check_alpha,
    mann_whitney_tests as mann_whitney_tests,
    scores_by_activity as scores_by_activity,
    share_significant as share_significant,
    significance_intervals as significance_intervals,
)

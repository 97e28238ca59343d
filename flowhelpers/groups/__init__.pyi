from .coactivation import (
    coactivation_by_cosine as coactivation_by_cosine,
    coactivation_of_matches as coactivation_of_matches,
    disagreements as disagreements,
)
from .intervals import (
    share_intervals as share_intervals,
    significance_intervals as significance_intervals,
    transition_intervals as transition_intervals,
)
from .occurrences import (
    GROUPS as GROUPS,
    Occurrences as Occurrences,
    find_occurrences as find_occurrences,
    group_names as group_names,
    group_profiles as group_profiles,
    group_shares as group_shares,
    modules_of as modules_of,
    score_histograms as score_histograms,
    shuffled_tokens as shuffled_tokens,
    single_source_points as single_source_points,
    with_dataset as with_dataset,
    youden_thresholds as youden_thresholds,
)
from .plots import (
    GROUP_COLOURS as GROUP_COLOURS,
    GROUP_MARKS as GROUP_MARKS,
    class_bars as class_bars,
    group_bars as group_bars,
    group_scatter as group_scatter,
    groups_by_layer as groups_by_layer,
    pair_heatmaps as pair_heatmaps,
    score_densities as score_densities,
    together_by_cosine as together_by_cosine,
    transition_heatmap as transition_heatmap,
)
from .significance import (
    NAMED_PAIRS as NAMED_PAIRS,
    check_alpha as check_alpha,
    class_shares as class_shares,
    mann_whitney_tests as mann_whitney_tests,
    scores_by_activity as scores_by_activity,
    share_significant as share_significant,
)

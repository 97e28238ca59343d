from .controls import (
    difference_of_means as difference_of_means,
    equal_norm_cells as equal_norm_cells,
    random_cells as random_cells,
    side_effects as side_effects,
    total_norm as total_norm,
)
from .plans import (
    STRATEGIES as STRATEGIES,
    load_plan as load_plan,
    make_plan as make_plan,
    save_plan as save_plan,
    schedule as schedule,
)
from .plots import (
    best_by_layer as best_by_layer,
    dose_response as dose_response,
    features_by_layer as features_by_layer,
    score_against as score_against,
    strategies_by_theme as strategies_by_theme,
    suppression_by_layer as suppression_by_layer,
)
from .scores import (
    beside_unsteered as beside_unsteered,
    best_cells as best_cells,
    cell_means as cell_means,
    paired_differences as paired_differences,
    score_texts as score_texts,
    selection_bias as selection_bias,
    verdicts as verdicts,
    with_costs as with_costs,
)
from .sweeps import (
    SweepCell as SweepCell,
    graph_cells as graph_cells,
    steer as steer,
    sweep as sweep,
)
from .themes import (
    judge_of as judge_of,
    output_scores as output_scores,
    theme_features as theme_features,
    theme_of as theme_of,
)

from .ablation import (
    ablation_cases as ablation_cases,
    common_targets as common_targets,
    concat_methods as concat_methods,
    deactivate as deactivate,
    downstream_effects as downstream_effects,
    success_rates as success_rates,
    table_1 as table_1,
)
from .plots import (
    groups_after as groups_after,
    rate_panels as rate_panels,
    written_against_change as written_against_change,
)
from .targets import (
    CONTROL as CONTROL,
    active_predecessors as active_predecessors,
    draw_targets as draw_targets,
    equal_norm as equal_norm,
    groups_of as groups_of,
    middle_layers as middle_layers,
    sources_of as sources_of,
)

from .phases import PHASES as PHASES, all_phases as all_phases
from .plots import (
    by_depth as by_depth,
    groups_against_chance as groups_against_chance,
    groups_by_depth as groups_by_depth,
    phases_by_depth as phases_by_depth,
)
from .profile import (
    POOLED as POOLED,
    alike as alike,
    chosen_suites as chosen_suites,
    combined as combined,
    group_profile as group_profile,
    one_by_one as one_by_one,
    suite_profile as suite_profile,
)

from .bootstrap import (
    TIMES as TIMES,
    mean_intervals as mean_intervals,
    resamples as resamples,
)
from .cache import (
    DiskCache as DiskCache,
    cache_folder as cache_folder,
    cached_table as cached_table,
    key_of as key_of,
)
from .features import (
    MODULES as MODULES,
    FeatureId as FeatureId,
    Site as Site,
    parse_feature as parse_feature,
    parse_site as parse_site,
    predecessor_site as predecessor_site,
    predecessor_sites as predecessor_sites,
    suggestion as suggestion,
)
from .figures import (
    COLOURS as COLOURS,
    GREY as GREY,
    INK as INK,
    MARGIN as MARGIN,
    NAMES as NAMES,
    PALE as PALE,
    SYMBOLS as SYMBOLS,
    dress as dress,
    escape as escape,
    legend_below as legend_below,
    step as step,
)
from .files import (
    DATA as DATA,
    fingerprint as fingerprint,
    new_folder as new_folder,
    read_json as read_json,
    to_json as to_json,
    writable_folder as writable_folder,
    write_json as write_json,
    write_text as write_text,
    write_whole as write_whole,
)
from .machine import (
    check_device as check_device,
    check_memory as check_memory,
    fitting_threads as fitting_threads,
    free_memory as free_memory,
)
from .progress_bar import (
    live as live,
    progress as progress,
)
from .versions import (
    naming_untried as naming_untried,
    untried as untried,
    warn_of_untried as warn_of_untried,
)

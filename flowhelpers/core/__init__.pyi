from .bootstrap import mean_intervals as mean_intervals
from .cache import DiskCache as DiskCache, cache_folder as cache_folder
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
from .figures import COLOURS as COLOURS, dress as dress
from .files import read_json as read_json, write_json as write_json
from .progress_bar import live as live, progress as progress

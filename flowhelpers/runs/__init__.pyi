from .execute import resume as resume
from .parameters import merged as merged
from .parameters import plan as plan
from .run import Run as Run
from .run import check as check
from .run import environment as environment
from .run import start_run as start_run

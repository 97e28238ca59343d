from .execute import (
    resume as resume,
    run_notebooks as run_notebooks,
)
from .notebooks import (
    find_notebooks as find_notebooks,
    notebooks_folder as notebooks_folder,
    plan as plan,
)
from .parameters import (
    inspect as inspect,
)
from .run import (
    RUNS as RUNS,
    environment as environment,
    start_run as start_run,
)
from .teaching import (
    check as check,
)

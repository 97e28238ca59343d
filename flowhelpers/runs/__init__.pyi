from .execute import resume as resume, run_notebooks as run_notebooks
from .parameters import (
    NOTEBOOKS as NOTEBOOKS,
    find_notebooks as find_notebooks,
    inspect as inspect,
    notebooks_folder as notebooks_folder,
    plan as plan,
)
from .run import (
    RUNS as RUNS,
    Run as Run,
    check as check,
    environment as environment,
    start_run as start_run,
)

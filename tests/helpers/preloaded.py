"""What the ranks of `tests.helpers.forks` find imported. Only imports: nothing here may start a thread or a process."""

import nemo_opd.assemble
import nemo_opd.session  # noqa: F401

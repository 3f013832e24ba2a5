"""Everything in another Python that it starts."""

import subprocess
import sys

subprocess.run([sys.executable, "-c", "print('anything may run here')"], check=True)

# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The commands of `dflash-hub`, one file each; `cli` assembles them.

Slow imports (torch, transformers) are inside the commands, so that `--help` answers at once.
"""

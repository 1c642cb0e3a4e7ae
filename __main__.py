# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run the command line as `python -m dflash_hub`."""

from .cli import main

if __name__ == "__main__":
    main()

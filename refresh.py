# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Keep `dflash_hub.refresh` importable, the former name of `dflash_hub.publishing.refresh`."""

from .publishing.refresh import RefreshOptions, refresh

__all__ = ["RefreshOptions", "refresh"]

"""One typed configuration: read from YAML, checked strictly, written into the run folder.

`load_config("configs/sample.yaml", ["training.seed=7"]).training.seed` is 7. An unknown key or a
wrong type is a `ConfigError` that names the key, its file and line, and the nearest valid key.
"""

from wuxia_core.config.load import PROJECT, TINY_BASE, load_config, locate
from wuxia_core.config.schema import Config, DataConfig, ModelConfig

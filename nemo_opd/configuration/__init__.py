"""From a recipe and a command line to a checked `nemo_opd.config.Config`, without torch or NeMo.

`strict_yaml` reads a recipe as data, `load` merges schema < algorithm's record < recipe < command line, and `check`
holds the rules between fields and against the models' config.json.
"""

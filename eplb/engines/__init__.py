"""Statistics and plans of the serving engines, one module an engine.

Each module knows the files of one engine at the release it names, and nothing of the others; what
they share is in :mod:`eplb.engines.engine`. Plans go out and come in through
:mod:`eplb.engines.convert`, which also decides what an engine cannot express. Recorded loads come
in through :mod:`eplb.profiles`, which finds the engine by the kind of file.
"""

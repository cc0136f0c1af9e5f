"""vLLM as generator and as served teacher: servers of our own around its engine, and their clients.

`sampler` and `server*` run in a server's process and import vLLM; everything else is the client's side and does not, so
that a trainer needs no vLLM where its servers are elsewhere.
"""

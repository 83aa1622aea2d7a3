"""Evaluation of run files against judgements. Knows nothing of models, bundles or jobs.

Files → measures per topic (`metrics`) → means, compared with a baseline (`evaluation`,
`significance`) → a table for people (`report`).
"""

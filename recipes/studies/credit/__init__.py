"""Does credit matter? Three tasks whose optimal credit is known, every rule, several seeds: see README.md beside this file.

python -m recipes.studies.credit run --out DIR
python -m recipes.studies.credit report DIR
"""

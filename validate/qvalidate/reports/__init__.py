"""A Result as files for others: JUnit XML, SARIF, one HTML page, and the schema of its JSON.

Every module here renders values that exist already. None of them reads a checkpoint, asks an
engine or judges anything: what a report says, the Result says.
"""

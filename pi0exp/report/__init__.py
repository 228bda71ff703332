"""The report: tables and pages of measured studies, each beside what was published.  python -m pi0exp.report --help"""

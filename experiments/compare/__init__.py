"""The comparison of methods: a study's runs, its tables and figures (``fedmask compare``)."""

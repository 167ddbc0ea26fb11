"""The pruning methods: one file, one YAML under conf/method and one test each. Methods never import each other."""

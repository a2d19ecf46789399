"""Our own measurements: each study is a command that writes a results file. Imports everything; nobody imports it."""

"""The command line, `deepseek-mp`: parse, call one public function, print."""

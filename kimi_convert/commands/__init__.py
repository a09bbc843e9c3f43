"""One thin file for each command: parse, call the library, show. Policy lives in the library."""

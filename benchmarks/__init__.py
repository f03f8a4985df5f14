"""Speed and memory beside what users would pick instead, each case in a process of its own."""

"""What is fast, and by how much: measurements that anyone can repeat."""

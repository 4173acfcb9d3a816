"""Who is who, and who said what: certificates, mutual TLS and signatures."""

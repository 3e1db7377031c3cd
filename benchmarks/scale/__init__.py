"""How far one machine goes: ingest and what follows it, at 10⁵ to 10⁷ tasks."""

"""The parts that methods are made of; none of them knows a run."""

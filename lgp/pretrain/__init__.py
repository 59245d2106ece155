"""An arm's training: MIM, CL, the graft, the controls; conflict, plan, sanity checks."""

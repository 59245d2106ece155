"""Pre-training of the arms: MIM, CL, the graft, the controls. Also gradient conflict, the plan, sanity checks."""

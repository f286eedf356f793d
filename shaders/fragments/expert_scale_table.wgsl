// A zero expert has no scale of its own.
fn expert_scale(id: u32) -> f32 {
    if id >= NUM_EXPERTS {
        return 1.0;
    }
    return per_expert_scale[id];
}

fn finish(row: u32, feature: u32, gate: f32, up: f32) -> f32 {
    return gate + previous_router_states[row * OUT_COLS + feature] * router_states_scale[feature];
}

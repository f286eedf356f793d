fn global_scale() -> f32 {
    return global_scales[0];
}

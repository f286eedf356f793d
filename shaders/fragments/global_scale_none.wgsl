fn global_scale() -> f32 {
    return 1.0;
}

fn final_scale(raw: u32) -> u32 {
    return raw;
}

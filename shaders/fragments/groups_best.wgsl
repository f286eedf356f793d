const GROUP_SIZE: u32 = SELECTABLE / N_GROUP;
const_assert SELECTABLE % N_GROUP == 0u;

var<workgroup> group_keys: array<u32, N_GROUP>;
var<workgroup> group_allowed: array<u32, N_GROUP>;

// Membership of a group, never a fill value: with negative keys any fill could win.
fn is_allowed(e: u32) -> bool {
    return group_allowed[e / GROUP_SIZE] != 0u;
}

fn allow_groups(index: u32) {
    for (var group = index; group < N_GROUP; group += WORKGROUP) {
        var first = 0u;
        var second = 0u;
        for (var e = group * GROUP_SIZE; e < (group + 1u) * GROUP_SIZE; e++) {
            let key = group_member_key(e);
            if key > first {
                second = first;
                first = key;
            } else if key > second {
                second = key;
            }
        }
        group_keys[group] = group_judgement(first, second);
    }
    workgroupBarrier();
    for (var group = index; group < N_GROUP; group += WORKGROUP) {
        var rank = 0u;
        for (var other = 0u; other < N_GROUP; other++) {
            let larger = group_keys[other] > group_keys[group];
            if larger || (group_keys[other] == group_keys[group] && other < group) {
                rank++;
            }
        }
        group_allowed[group] = select(0u, 1u, rank < TOPK_GROUP);
    }
    workgroupBarrier();
    // The keys of the others are below every number's. Nobody reads them but in comparisons.
    for (var e = index; e < SELECTABLE; e += WORKGROUP) {
        keys[e] = select(0u, keys[e], is_allowed(e));
    }
    workgroupBarrier();
}

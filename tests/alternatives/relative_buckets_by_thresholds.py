"""common/t5.py: the bucket of a distance by counting the thresholds it reaches."""


class RelativeBias:
    def bucket(self, distance):
        half = self.buckets // 2 if self.bidirectional else self.buckets
        away = distance.abs() if self.bidirectional else (-distance).clamp(min=0)
        exact = half // 2
        numbers = []
        for d in away.flatten().tolist():
            far = math.log(max(d, 1) / exact) / math.log(self.max_distance / exact)
            numbers.append(d if d < exact else min(exact + int(far * (half - exact) + 1e-6), half - 1))
        number = torch.tensor(numbers, device=distance.device).view(distance.shape)
        return number + half * (distance > 0) if self.bidirectional else number

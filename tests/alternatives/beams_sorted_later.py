"""common/beam_search.py: finished texts are kept in lists and sorted by Python."""


class BeamSearch:
    def finish(self, ids, scores, length):
        scores = scores / length ** self.length_penalty
        for b in range(len(scores)):
            if self.done[b]:
                continue
            texts = list(zip(self.finished_scores[b].tolist(), self.finished_lengths[b].tolist(),
                             self.finished_ids[b].tolist()))
            texts += [(score, length, text)
                      for score, text in zip(scores[b].tolist(), ids[b].tolist())]
            texts.sort(key=lambda text: -text[0])
            for place, (score, count, text) in enumerate(texts[:self.num_beams]):
                self.finished_scores[b, place] = score
                self.finished_lengths[b, place] = count
                self.finished_ids[b, place] = torch.tensor(text)

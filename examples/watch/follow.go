// follow.go prints the living members, at the start and after each change.
//
// "hamlet watch" says when to look, and "hamlet members" what there is: so no
// change is missed, and it does not matter how much happened meanwhile.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"time"
)

const events = "member,member-join,member-leave,member-failed,member-update,member-reap"

type member struct{ Name, Addr string }

func changed(members []member) { // put your own work here
	fmt.Print("alive:")
	for _, m := range members {
		fmt.Printf(" %s=%s", m.Name, m.Addr)
	}
	fmt.Println()
}

func living() ([]member, error) {
	out, err := exec.Command("hamlet", "members", "-status", "alive", "-format", "json").Output()
	if err != nil {
		return nil, err
	}
	var list struct{ Members []member }
	err = json.Unmarshal(out, &list)
	return list.Members, err
}

// follow returns when the agent ends.
func follow() error {
	watch := exec.Command("hamlet", "watch", "-event", events, "-format", "json")
	watch.Stderr = os.Stderr
	stdout, err := watch.StdoutPipe()
	if err != nil {
		return err
	}
	if err := watch.Start(); err != nil {
		return err
	}
	defer watch.Wait()
	defer watch.Process.Kill()

	var last []member
	for lines := json.NewDecoder(stdout); ; {
		var line struct{ Event string }
		if err := lines.Decode(&line); err != nil {
			return err
		}
		// A watch begins with a line for each known member: the first one will do.
		if line.Event == "member" && last != nil {
			continue
		}
		now, err := living()
		if err != nil {
			return err
		}
		if !slices.Equal(now, last) {
			changed(now)
		}
		last = now
	}
}

func main() {
	for {
		if err := follow(); err != nil {
			fmt.Fprintln(os.Stderr, "follow:", err)
		}
		time.Sleep(time.Second)
	}
}
